"""Tenants in files: what a manifest may hold, how it is read, applied and written."""
