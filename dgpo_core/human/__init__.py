"""A person as the reward: questions that wait for an answer, the page that asks them, and the reward `human`."""
