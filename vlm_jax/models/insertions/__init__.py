"""Modules that insert into a model: adapters, low rank, prefixes, prompts, contexts; see `models.insertion`."""
