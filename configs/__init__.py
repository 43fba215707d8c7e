"""Recipes: one TOML file each, found by name (``vmae-fast pretrain --config tiny``)."""
