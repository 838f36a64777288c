"""verl and vLLM without a GPU: chosen by ``hardware=cpu`` (or ``VERL_PLATFORM=cpu``), never by auto-detection."""
