"""The page at `/`: a chat and a live view of the running model, as files that need no network and no build step."""
