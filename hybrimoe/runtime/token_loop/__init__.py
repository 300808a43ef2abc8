"""A token of a captured step without Python: one compiled call launches, waits, decides, copies and computes."""
