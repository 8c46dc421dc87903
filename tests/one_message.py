"""What every refusal of bad input looks like."""


def check_message(code: int, output: str, word: str) -> None:
    """Status 2 and exactly one message with got, wanted, way out and this word."""
    assert code == 2, output
    assert "Traceback" not in output, output
    assert output.count("ddrl_jax: error: ") == 1
    for part in ("\n  got:     ", "\n  wanted:  ", "\n  way out: "):
        assert output.count(part) == 1, output
    assert word in output, output
