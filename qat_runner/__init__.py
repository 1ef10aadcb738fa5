"""qat_runner: how few bits can this network live with, and which quantizer gets it there?"""
