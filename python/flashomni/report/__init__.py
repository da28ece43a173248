"""The HTML report of a demo run: data (JSON), figures (SVG), pages (HTML)."""
