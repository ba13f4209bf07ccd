"""Mutation testing: small changes of the program, each of which some test must notice."""
