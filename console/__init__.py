"""The console: what an operator's browser, scripts and monitoring see. It parses, calls `operations`, and shows."""
