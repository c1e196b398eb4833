"""The tag of the wheel; all else is in pyproject.toml."""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class AnyPython3(bdist_wheel):
    """Python loads the library by ctypes: it depends on the platform, and on no version of Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"bdist_wheel": AnyPython3})
