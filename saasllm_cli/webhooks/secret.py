"""What signs a webhook's deliveries."""

import base64
import secrets
from datetime import datetime, timedelta

from saasllm_cli.database import Database
from saasllm_cli.encryption import encrypt, webhook_owner


def add_secret(db: Database, webhook_id: int, keep: timedelta) -> tuple[str, datetime | None]:
    """A new secret, stored encrypted, and when the one before it expires."""
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
    stored = encrypt(secret, webhook_owner({"webhook_id": webhook_id}))
    added = db.one("webhook.add_secret", webhook_id=webhook_id, secret=stored, keep=keep)
    return secret, added["previous_secret_expires_at"]
