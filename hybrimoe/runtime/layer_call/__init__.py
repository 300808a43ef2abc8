"""One call of a layer's experts: routing, plan, lanes, result, and what is learnt from it."""
