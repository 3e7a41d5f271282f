"""Seekers' records, demonstrations of how to answer them, and the tiny policy trained on those."""

from data.records import RecordError, SeekerRecord, embedded_policy, load_records

__all__ = ["RecordError", "SeekerRecord", "embedded_policy", "load_records"]
