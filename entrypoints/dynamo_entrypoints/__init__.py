"""Thin registration: engine plugins and console commands. No logic lives here."""
