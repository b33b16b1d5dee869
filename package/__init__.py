"""Debian packages, made from this checkout: ``python -m package``, which ``./dev package`` runs."""
