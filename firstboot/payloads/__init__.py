"""What the two roles mean, payload by payload."""
