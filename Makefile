SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
