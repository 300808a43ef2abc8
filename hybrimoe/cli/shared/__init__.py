"""What several commands share: options and groups of them, the deployment they describe, files, an open model."""
