"""How fast chatterd is, beside two peers on the same machine in the same run: `make bench`."""
