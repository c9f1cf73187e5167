"""What runs a language model: loading, adapters, the reference, token requests, sampling."""
