"""The load side: what becomes of events. Imports nothing of the program, so that every room may hand it events."""
