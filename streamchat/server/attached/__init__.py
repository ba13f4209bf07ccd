"""Lets front ends in other processes use the server's sessions: `streamchat attach`."""
