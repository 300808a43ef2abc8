"""HTTP APIs over one model. Needs the extra `serve`; nothing else imports this package."""
