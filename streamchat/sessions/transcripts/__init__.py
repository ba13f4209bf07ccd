"""Transcripts: conversations in files, in the formats of this program, of data sets and of other programs.

`formats` has the table of formats, `reader` reads a file, `export` writes one, and `imported` makes sessions of it.
"""
