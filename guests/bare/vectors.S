/* One 16-byte stub for each vector: error code (or 0), vector, then the common part, which calls on_trap(frame). */
    .text
    .globl vector_stubs
    .balign 16
vector_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .if vector != 8 && vector != 10 && vector != 11 && vector != 12 && vector != 13 && vector != 14 && vector != 17
    push $0
    .endif
    push $vector
    jmp vector_common
    .set vector, vector + 1
    .endr

vector_common:
#ifdef __x86_64__
    push %rax
    push %rcx
    push %rdx
    push %rsi
    push %rdi
    push %r8
    push %r9
    push %r10
    push %r11
    cld
    mov %rsp, %rdi
    call on_trap
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rdi
    pop %rsi
    pop %rdx
    pop %rcx
    pop %rax
    add $16, %rsp
    iretq
#else
    pusha
    cld
    push %esp
    call on_trap
    add $4, %esp
    popa
    add $8, %esp
    /* The same as iret, to the same privilege level; KVM's emulator has no iret in protected mode. */
    pushl 8(%esp)
    popf
    lret $4
#endif

    .section .note.GNU-stack, "", @progbits
