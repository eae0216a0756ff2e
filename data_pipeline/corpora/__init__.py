"""Texts: folders, tars, JSON, tables and web pages, read as documents."""
