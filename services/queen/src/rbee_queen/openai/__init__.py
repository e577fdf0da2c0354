"""The OpenAI front door: requests as OpenAI's and Anthropic's clients send them, each of them a job."""

from rbee_queen.openai.aliases import Aliases
from rbee_queen.openai.handler import OpenAIJobs
from rbee_queen.openai.routes import openai_routes
from rbee_queen.openai.shapes import ErrorShapes

__all__ = ["Aliases", "ErrorShapes", "OpenAIJobs", "openai_routes"]
