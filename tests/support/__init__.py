"""Things that test files share: small models and data, naive implementations, programs that tests start."""
