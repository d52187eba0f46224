"""One file a noun, one function a verb: parse, ask the database, show."""
