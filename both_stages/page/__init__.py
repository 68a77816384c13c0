"""The page: sampling in a browser, from a server of this machine."""
