"""Webhooks: sends events to endpoints."""
