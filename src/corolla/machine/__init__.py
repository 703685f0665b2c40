"""Machine code for what torch is slow at, made where it runs. Needs llvmlite: imported only where that is installed."""
