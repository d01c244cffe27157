"""The operations in Triton, one file each, named as the operation, with its equation, gradient and bytes.

They have a folder of their own because a module kernels.swiglu would take the place of the function of that
name.
"""
