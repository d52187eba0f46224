from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result

from saasllm_cli.settings import settings

Run = Callable[..., Result]


def test_the_story_is_told_twice(
    server: str, data_dir: Path, home: Path, run: Run, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """It plays on the embedded server, whatever database the settings name."""
    if request.config.getoption("--postgres-bin"):
        pytest.skip("the demo plays on the embedded server")
    monkeypatch.setenv("SAASLLM_DATA_DIR", str(data_dir / "embedded"))
    monkeypatch.setenv("SAASLLM_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    for _ in range(2):
        settings.cache_clear()
        result = run("demo")
        assert result.status == 0, result.err
        assert "$ saasllm apply -f - <<END\norganizations:\n" in result.out
        assert "credits_remaining  148" in result.out
        assert "credits_reserved   0" in result.out
        assert "(exit status 8)" in result.out
        assert "OPENAI_API_KEY" in result.out
        assert "offline/fail/gpt-4-turbo failed: 503" in result.err
