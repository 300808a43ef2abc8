"""The deployment configuration: the YAML file's schema, its values and its errors."""
