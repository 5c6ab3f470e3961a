"""Settings for all tests."""

import os

from hypothesis import settings

# times vary on shared machines; and a test that fails should fail for the change that broke it
settings.register_profile("default", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("default")
