"""What is done to a model before or after training: dense weights loaded, masks applied, made permanent, CSR.

No step is made here.
"""
