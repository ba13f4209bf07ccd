"""Sessions in a folder that several machines share: one owner per session, and no database on the network."""
