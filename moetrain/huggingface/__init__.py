"""Hugging Face folders of Mixtral and Mistral: their names, configuration and files."""
