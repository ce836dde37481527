"""What transformers' suite expects, redepth does otherwise on purpose, and no flag of the suite declares."""

DEPTH = "TestRecurrentDepth"
GEMMA = "TestRecurrentGemma"

# (test class, test, without the parameters at its end): why redepth differs
BY_DESIGN: dict[tuple[str, str], str] = {
    (DEPTH, "test_model_rope_scaling_from_config"): "a text longer than block_size is refused; the test runs one",
    (GEMMA, "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions"): (
        "attention maps are refused under sdpa; the test expects a silent change to eager attention"
    ),
}


def reason_for(test_class: str, test: str) -> str | None:
    """Why `test` of `test_class` fails by design, or None. A row covers all parameters of its test."""
    for (listed_class, listed_test), reason in BY_DESIGN.items():
        if listed_class == test_class and (test == listed_test or test.startswith(f"{listed_test}_")):
            return reason
    return None
