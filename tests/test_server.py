"""The process: start, stop, TLS, and what only a real server shows."""
