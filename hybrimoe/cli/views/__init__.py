"""How commands show results: tables, summaries, timelines, errors."""
