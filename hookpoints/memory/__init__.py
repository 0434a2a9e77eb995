"""What a model carries from one token to the next, as a value: inspect, cut, paste, compress, save."""
