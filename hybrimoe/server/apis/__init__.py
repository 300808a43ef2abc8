"""The HTTP APIs, one module each: what a request means is translated into `hybrimoe.server.asking`, and back."""
