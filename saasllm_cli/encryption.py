"""Secrets at rest: encrypted by master keys, which the database does not have.

The master keys come from `SAASLLM_MASTER_KEYS` or a file; the first one encrypts, each of them decrypts, so that a key
can be replaced. What is encrypted is bound to what it belongs to: copied to another row, it does not decrypt.
"""

import base64
import json
import secrets
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from saasllm_cli.errors import InvalidInput
from saasllm_cli.settings import settings

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

KEY_BYTES = 32


def new_master_key() -> str:
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def encrypt(secret: str, owner: str) -> str:
    """As it is stored, for what is named `owner`, such as `webhook 3`; `InvalidInput` where there is no master key."""
    return _master_keys()[0].encrypt(json.dumps([owner, secret]).encode()).decode()


def decrypt(stored: str, owner: str) -> str:
    """`InvalidInput` where there is no master key, or none by which this was encrypted for that owner."""
    return _decrypted(stored, owner)[0]


def rewrapped(stored: str, owner: str) -> str | None:
    """As it is stored by the first master key; None where it is already. Raises as `decrypt`."""
    secret, number = _decrypted(stored, owner)
    return encrypt(secret, owner) if number else None


def credential_owner(credential: Mapping[str, Any]) -> str:
    """What a credential's value is bound to, so that it is of no use elsewhere: its owner, its provider, and where it
    is sent."""
    team, organization, api_base = credential["team_id"], credential["organization_id"], credential["api_base"]
    if organization is None:
        return "the master key of the proxy"
    owner = f"team {team} of {organization}" if team else f"organization {organization}"
    at = f" at {api_base}" if api_base else ""
    return f"the {credential['provider']} credential of {owner}{at}"


def webhook_owner(secret: Mapping[str, Any]) -> str:
    """What the secret of a webhook is bound to."""
    return f"webhook {secret['webhook_id']}"


def has_master_key() -> bool:
    return settings().master_keys is not None or settings().master_key_file is not None


def require_master_key() -> None:
    """`InvalidInput` where there is none, or one that is none."""
    _master_keys()


def _decrypted(stored: str, owner: str) -> tuple[str, int]:
    """The secret, and which of the master keys has decrypted it."""
    from cryptography.fernet import InvalidToken

    for number, key in enumerate(_master_keys()):
        try:
            found, secret = json.loads(key.decrypt(stored.encode()))
        except InvalidToken:
            continue
        if found == owner:
            return str(secret), number
    raise InvalidInput(
        "cannot_decrypt",
        f"The secret of {owner} cannot be decrypted by the master keys.",
        "Add the key by which it was encrypted to SAASLLM_MASTER_KEYS.",
    )


def _master_keys() -> "list[Fernet]":
    given, file = settings().master_keys, settings().master_key_file
    name = "SAASLLM_MASTER_KEYS"
    if given is not None:
        text = given.get_secret_value()
    elif file is not None:
        name = f"SAASLLM_MASTER_KEY_FILE, {file}"
        try:
            text = file.expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "it is not a text file"
            raise InvalidInput(
                "invalid_master_key", f"Cannot read {name}: {reason}.", "Correct SAASLLM_MASTER_KEY_FILE."
            ) from error
    else:
        raise InvalidInput(
            "no_master_key",
            "No master key is set, and secrets are stored only encrypted.",
            "Set SAASLLM_MASTER_KEYS or SAASLLM_MASTER_KEY_FILE. "
            "To make the first key, run: saasllm credential generate-key",
        )
    return _made_of(text, name)


@cache
def _made_of(text: str, name: str) -> "list[Fernet]":
    from cryptography.fernet import Fernet

    try:
        # As openssl writes it, or as Fernet does.
        keys = [
            base64.b64decode(key.replace("-", "+").replace("_", "/"), validate=True)
            for key in text.replace(",", " ").split()
        ]
    except ValueError:
        keys = []
    if not keys or any(len(key) != KEY_BYTES for key in keys):
        raise InvalidInput(
            "invalid_master_key",
            f"Invalid {name}: it must hold keys of {KEY_BYTES} bytes in base64, separated by commas.",
            "To make one, run: saasllm credential generate-key",
        )
    return [Fernet(base64.urlsafe_b64encode(key)) for key in keys]
