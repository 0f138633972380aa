"""Muon + AdamW in one optimizer, explicit parameter groups and closed-form schedules."""

__all__: list[str] = []
