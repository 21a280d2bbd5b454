"""Choosing: what a run takes before it is started."""

from rankwise.select.devices import DEVICES, Device
from rankwise.select.memory import Footprint
from rankwise.select.plan import Plan, Remedy, of_run, plan

__all__ = ["DEVICES", "Device", "Footprint", "Plan", "Remedy", "of_run", "plan"]
