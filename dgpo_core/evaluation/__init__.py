"""How good an adapter is: scores of held-out prompts, the alarm, reports."""
