"""Where ranks run: in this process, on Ray, or under somebody else's launcher."""

from launch.plan import Plan, choose_plan
from launch.ray_cluster import ClusterError
from launch.settings import ClusterSettings, LaunchSettings
from launch.start import start

__all__ = ["ClusterError", "ClusterSettings", "LaunchSettings", "Plan", "choose_plan", "start"]
