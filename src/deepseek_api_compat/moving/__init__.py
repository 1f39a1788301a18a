"""Moving in from other gateways: what their files say, as our configuration and keys."""
