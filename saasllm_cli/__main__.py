"""`python -m saasllm_cli` is `saasllm`."""

from saasllm_cli.cli import main

if __name__ == "__main__":
    main()
