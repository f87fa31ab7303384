"""Rewards on other machines: addresses, requests and their wire format."""
