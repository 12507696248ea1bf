"""Moved to agent_sdk.tools; goes away before the first release."""

from agent_sdk.tools import FunctionTool, Tool, ToolContext, ToolResult, decode_arguments, tool

__all__ = ["FunctionTool", "Tool", "ToolContext", "ToolResult", "decode_arguments", "tool"]
